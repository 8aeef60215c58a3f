#!/usr/bin/env bash
# The sweeps whose rows are in this folder: some two hours on two cores, and five more for the paper's. Each adds what is
# not there yet, so any of them can be widened and run again. A validation set decides, but in the last ones.
set -euo pipefail
sweep() { rankdecay boundary --preset standard --precision mixed --compile on --widen 0 --out "runs/$1" "${@:2}"; }

sweep selection --task selection --seeds 5 \
  --arms none l2 prox smooth prototype uniform_attention radial_only tangential_only raise_rank sphere \
  sphere_low_rank fast_query_key \
  --strengths l2=7.5,15,30,60,120 radial_only=1.25,2.5,5,10,20,40 tangential_only=5,10,20,40 raise_rank=2.5,5,10,20 \
  sphere_low_rank=0.1,0.2,0.4,0.8,1.6,3.2 fast_query_key=1.5,3,6,12
sweep selection --task selection --seeds 5 \
  --arms l2_all no_qk_norm low_rank_all truncate after_memorising kept_on until_generalised target_rank \
  target_rank_head \
  --strengths l2_all=1,2,4 no_qk_norm=7.5,15,30,60,120 low_rank_all=1.25,2.5,5 truncate=4,8,16 \
  after_memorising=2.5,5,10,20 kept_on=5 until_generalised=5 target_rank=1.5,3,6 target_rank_head=6
# Less data for the arms that need least, more for those that need most.
sweep selection --task selection --seeds 5 --train-examples 600 \
  --arms l2 smooth prototype radial_only raise_rank no_qk_norm \
  --strengths l2=7.5,15,30,60,120 radial_only=1.25,2.5,5,10,20,40 raise_rank=2.5,5,10,20 no_qk_norm=7.5,15,30,60,120
sweep selection --task selection --seeds 5 --train-examples 1600 \
  --arms none l2 smooth fast_query_key uniform_attention sphere_low_rank truncate after_memorising l2_all \
  target_rank_head \
  --strengths l2=7.5,15,30,60,120 sphere_low_rank=0.1,0.2,0.4,0.8,1.6,3.2 fast_query_key=1.5,3,6,12 l2_all=1,2,4 \
  truncate=4,8,16 after_memorising=2.5,5,10,20 target_rank_head=6
sweep selection --task selection --seeds 3 --rest-decays 0.5 1 4 8 --train-examples 700 1000 1250 \
  --arms none l2 smooth prototype radial_only raise_rank \
  --strengths l2=15,30,60 smooth=2.5,5,10 prototype=0.01 radial_only=5 raise_rank=10
sweep selection --task selection --seeds 5 --rest-decays 1 --train-examples 600 700 850 1000 1250 --arms l2 smooth \
  --strengths l2=7.5,15,30,60,120 smooth=1.25,2.5,5,10
sweep selection_named1 --task selection --named 1 --steps 1600 --seeds 3 --train-examples 700 1000 \
  --arms none l2 smooth radial_only --strengths l2=30 smooth=5 radial_only=5
sweep selection_named3 --task selection --named 3 --steps 1600 --seeds 3 --train-examples 2000 3000 \
  --arms none l2 smooth prototype radial_only raise_rank \
  --strengths l2=3.75,7.5,15,30 smooth=0.625,1.25,2.5,5 prototype=0.00125,0.0025,0.005,0.01 \
  radial_only=0.625,1.25,2.5,5 raise_rank=0.625,1.25,2.5,5
sweep selection_six --task selection --values 6 --steps 1600 --seeds 3 --train-examples 1500 2500 \
  --arms none l2 smooth prototype radial_only raise_rank uniform_attention \
  --strengths l2=3.75,7.5,15,30 smooth=0.625,1.25,2.5,5 prototype=0.0025,0.005,0.01 radial_only=1.25,2.5,5 \
  raise_rank=1.25,2.5,5
sweep add --task add --seeds 3 --arms none l2 smooth prototype uniform_attention radial_only raise_rank \
  --strengths l2=2.5,5,10,20,40 smooth=1.25,2.5,5,10 prototype=0.00125,0.0025,0.005,0.01,0.02 \
  radial_only=0.625,1.25,2.5,5,10,20 raise_rank=0.625,1.25,2.5,5,10,20
sweep subtract --task subtract --seeds 3 --fractions 0.6 0.7 0.8 --arms none l2 smooth uniform_attention \
  --strengths l2=2.5,5,10,20 smooth=1.25,2.5,5,10
sweep divide --task divide --seeds 3 --fractions 0.4 0.5 0.6 0.7 0.8 --arms none l2 smooth uniform_attention \
  --strengths l2=2.5,5,10,20 smooth=0.625,1.25,2.5,5
sweep recall --task recall --seeds 3 --train-examples 600 800 1000 1400 --arms none l2 smooth uniform_attention \
  --strengths l2=7.5,15,30 smooth=1.25,2.5,5

# In these the test set decides: an older sweep, and the paper's settings and the prototype's, as with their authors.
sweep selection_31 --task selection --modulus 31 --width 128 --mlp-width 512 --lr 1e-3 --batch-size 256 --steps 640 \
  --seeds 3 --rest-decays 3 --train-examples 1500 2000 3000 --validation 0 --arms none l2 smooth prototype radial_only \
  raise_rank --strengths l2=30,100,300 smooth=5,10,20 prototype=0.005,0.01 radial_only=10 raise_rank=10
rankdecay boundary --preset prototype --precision mixed --compile on --widen 0 --out runs/prototype
paper() { rankdecay boundary --preset paper --precision float32 --seeds 1 --out "runs/$1" "${@:2}"; }
paper paper_multiply --precision mixed --task multiply --fractions 0.5 --arms none l2_all paper_a1
paper paper_multiply_l2 --precision mixed --task multiply --fractions 0.5 --arms l2_all \
  --strengths l2_all=0.2,0.5,1,2,4,8
paper paper_add --arms none paper_a1 l2_all --strengths l2_all=4,8
paper paper_add --fractions 0.3 0.4 0.5 0.6 0.7 0.8 --arms l2_all --strengths l2_all=2,16
paper paper_add --seeds 3 --arms paper_a1 l2_all --strengths paper_a1=0.005,0.01 l2_all=8
paper paper_add --seeds 2 --fractions 0.3 0.35 0.4 0.45 0.5 0.55 0.6 0.65 --arms paper_a1 --strengths paper_a1=0.001
paper paper_add --seeds 2 --fractions 0.5 0.7 0.8 --arms l2_all --strengths l2_all=4
paper paper_add --seeds 3 --fractions 0.3 0.4 0.6 --arms l2_all --strengths l2_all=4
paper paper_add_ordered --split ordered --arms paper_a1 l2_all --strengths paper_a1=0.001,0.005 l2_all=8
paper paper_add_ordered --split ordered --fractions 0.3 0.4 0.5 0.6 0.7 0.8 --arms paper_a1 l2_all \
  --strengths paper_a1=0.01 l2_all=2,4,16
paper paper_s5 --task s5 --fractions 0.5 --arms none paper_a1 l2_all --strengths l2_all=1,2,4,8,16
paper paper_s5 --task s5 --fractions 0.5 --arms paper_a1 --strengths paper_a1=0.002,0.003
paper paper_rules --arms paper_s6 paper_s5 prototype --strengths paper_s6=2.5 paper_s5=30 prototype=0.01
paper paper_rules --fractions 0.5 --arms paper_s6 paper_s5 prototype \
  --strengths paper_s6=0.05,5,10 paper_s5=0.05,10,100 prototype=0.005
paper paper_rules --fractions 0.3 0.4 --arms paper_s6 paper_s5 --strengths paper_s6=5 paper_s5=10
paper paper_rules --fractions 0.3 0.4 0.6 0.7 0.8 --arms paper_s6 paper_s5 --strengths paper_s6=0.05 paper_s5=0.05
