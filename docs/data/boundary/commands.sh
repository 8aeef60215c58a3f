#!/usr/bin/env bash
# The sweeps whose rows are in this folder, in the order they were run; about three hours on two cores. Each adds to its
# directory what is not there yet, so any of them can be widened and run again. All stop on the test set, as was the
# default then; `--preset paper` and `--preset prototype` still do.
set -euo pipefail
sweep() { rankdecay boundary --preset standard --validation 0 --precision mixed --compile on --widen 0 --out "runs/$1" "${@:2}"; }

sweep selection --task selection --seeds 5 \
  --arms none l2 low_rank smooth prototype uniform_attention radial_only tangential_only raise_rank sphere \
  sphere_low_rank fast_query_key \
  --strengths l2=3,10,30,100,300 radial_only=2.5,5,10 tangential_only=5,10,20 fast_query_key=3,10,30
sweep selection --task selection --seeds 5 --train-examples 600 --arms l2 smooth prototype radial_only raise_rank \
  --strengths l2=3,10,30,100,300 radial_only=2.5,5,10 raise_rank=2.5,5,10
sweep selection --task selection --seeds 5 \
  --arms l2_all no_qk_norm low_rank_all truncate after_memorising kept_on until_generalised target_rank \
  target_rank_head tangential_only sphere_low_rank \
  --strengths l2_all=1,2,4 no_qk_norm=3,10 low_rank_all=1.25,2.5 truncate=4,8 after_memorising=5,10 kept_on=5 \
  until_generalised=5 target_rank=3,6 target_rank_head=6 tangential_only=40 sphere_low_rank=1.6
sweep selection --task selection --seeds 3 --rest-decays 0.5 1 4 --train-examples 700 1000 1250 --arms none l2 smooth \
  --strengths l2=30 smooth=5
sweep selection --task selection --seeds 3 --rest-decays 0.3 1 5 --train-examples 700 1000 1250 \
  --arms none l2 smooth prototype radial_only raise_rank \
  --strengths l2=10,30,100 smooth=2.5,5,10 prototype=0.01 radial_only=5 raise_rank=10
sweep selection_31 --task selection --modulus 31 --width 128 --mlp-width 512 --lr 1e-3 --batch-size 256 --steps 640 \
  --seeds 3 --rest-decays 3 --train-examples 1500 2000 3000 --arms none l2 smooth prototype radial_only raise_rank \
  --strengths l2=30,100,300 smooth=5,10,20 prototype=0.005,0.01 radial_only=10 raise_rank=10
for named in 1 3; do
  sweep "selection_named$named" --task selection --named "$named" --steps 1600 --seeds 3 \
    --train-examples 700 1000 2000 --arms none l2 smooth radial_only --strengths l2=10,30 smooth=2.5,5 radial_only=5
done
sweep selection_named3 --task selection --named 3 --steps 1600 --seeds 3 --train-examples 3000 \
  --arms l2 smooth radial_only raise_rank prototype \
  --strengths l2=10,30 smooth=2.5,5 radial_only=2.5,5 raise_rank=10 prototype=0.01
sweep selection_six --task selection --values 6 --seeds 3 --train-examples 1500 2500 \
  --arms none l2 smooth radial_only uniform_attention --strengths l2=10,30 smooth=2.5,5 radial_only=5
sweep selection --task selection --seeds 5 \
  --arms raise_rank no_qk_norm low_rank_all target_rank truncate after_memorising \
  --strengths raise_rank=20 no_qk_norm=30 low_rank_all=5 target_rank=1.5 truncate=16 after_memorising=2.5
# One seed of every arm at another decay of the rest, on other sizes; stopped after 276 of 1460 runs.
sweep selection_rest3 --task selection --arms all --seeds 5 --rest-decays 3 --train-examples 700 900 1150 1500
sweep add --task add --seeds 3 --arms none l2 smooth prototype uniform_attention radial_only raise_rank \
  --strengths l2=3,10,30,100 smooth=1.25,2.5,5,10 prototype=0.0025,0.005,0.01,0.02 \
  radial_only=5,10,20 raise_rank=5,10,20
for task in subtract divide; do
  sweep "$task" --task "$task" --seeds 3 --fractions 0.6 0.7 0.8 --arms none l2 smooth uniform_attention \
    --strengths l2=3,10,30 smooth=1.25,2.5,5,10
done
sweep recall --task recall --seeds 3 --train-examples 1000 1400 --arms none l2 smooth uniform_attention \
  --strengths l2=10,30 smooth=1.25,2.5
sweep prototype --preset prototype

# The paper's settings: its step on its grid, L2 there and beyond; multiplication and S5 at one size, addition
# at eleven.
paper() { rankdecay boundary --preset paper --seeds 1 --out "runs/$1" "${@:2}"; }
paper paper_multiply --task multiply --fractions 0.5 --arms none l2_all paper_a1
paper paper_multiply_l2 --task multiply --fractions 0.5 --arms l2_all --strengths l2_all=0.2,0.5,1,2,4,8
paper paper_add --fractions 0.3 0.4 0.5 0.6 0.7 0.8 --precision float32 --arms paper_a1 l2_all \
  --strengths l2_all=2,4,8,16
paper paper_add --seeds 3 --fractions 0.3 0.4 0.5 0.6 --precision float32 --arms paper_a1 l2_all \
  --strengths paper_a1=0.005,0.01 l2_all=4,8  # stopped before the last of l2_all=4
paper paper_add --fractions 0.35 0.45 0.55 0.65 0.75 --precision float32 --arms paper_a1 l2_all \
  --strengths paper_a1=0.001,0.005,0.01 l2_all=4,8
paper paper_add --seeds 3 --fractions 0.35 0.45 0.55 0.65 0.7 0.75 0.8 --precision float32 --arms paper_a1 l2_all \
  --strengths paper_a1=0.005 l2_all=8
paper paper_add --fractions 0.45 0.55 0.65 0.75 --precision float32 --arms paper_a1 --strengths paper_a1=0.0005
paper paper_add --fractions 0.35 0.45 0.55 0.65 0.75 --precision float32 --arms paper_a1 \
  --strengths paper_a1=0.0001,0.0005,0.05
paper paper_add --fractions 0.3 0.35 0.4 0.45 0.5 0.55 0.6 0.65 0.7 0.75 0.8 --precision float32 --arms none
paper paper_add_ordered --split ordered --fractions 0.3 0.4 0.5 0.6 --precision float32 --arms paper_a1 l2_all \
  --strengths paper_a1=0.001,0.005,0.01 l2_all=2,4,8,16
paper paper_add_ordered --split ordered --fractions 0.7 0.8 --precision float32 --arms paper_a1 l2_all \
  --strengths paper_a1=0.001,0.005,0.01 l2_all=2,4,8,16
paper paper_add_ordered --split ordered --fractions 0.35 0.45 0.55 0.65 0.75 --precision float32 --arms paper_a1 l2_all \
  --strengths paper_a1=0.001,0.005 l2_all=8
paper paper_s5 --task s5 --fractions 0.5 --precision float32 --arms none paper_a1 l2_all --strengths l2_all=1,2,4,8,16
paper paper_s5 --task s5 --fractions 0.5 --precision float32 --arms paper_a1 --strengths paper_a1=0.002,0.003
paper paper_rules --fractions 0.5 --precision float32 --arms paper_s6 paper_s5 prototype \
  --strengths paper_s6=0.05,2.5,5,10 paper_s5=0.05,10,30,100 prototype=0.005,0.01
paper paper_rules --fractions 0.3 0.4 --precision float32 --arms paper_s6 paper_s5 --strengths paper_s6=2.5,5 paper_s5=10,30
paper paper_rules --fractions 0.6 0.8 --precision float32 --arms paper_s6 paper_s5 prototype \
  --strengths paper_s6=2.5 paper_s5=30 prototype=0.01
paper paper_rules --fractions 0.4 --precision float32 --arms prototype --strengths prototype=0.01
paper paper_rules --fractions 0.35 0.45 0.55 0.65 0.7 0.75 --precision float32 --arms paper_s6 paper_s5 prototype \
  --strengths paper_s6=2.5 paper_s5=30 prototype=0.01
paper paper_rules --fractions 0.3 0.4 0.6 0.7 0.8 --precision float32 --arms paper_s6 paper_s5 \
  --strengths paper_s6=0.05 paper_s5=0.05
paper paper_rules --fractions 0.3 --precision float32 --arms prototype --strengths prototype=0.01
