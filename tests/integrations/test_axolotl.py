"""The plugin in axolotl's own manager and validation, in one process of its own: axolotl is beside the environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import needs
from tests.waiting import HANG

needs.package("transformers")
needs.package("peft")

PLUGIN = "rankdecay.integrations.axolotl.RankDecayPlugin"
CONFIGURATION: dict[str, Any] = {
    "base_model": "none",
    "datasets": [{"path": "none", "type": "alpaca"}],
    "learning_rate": 1e-3,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "plugins": [PLUGIN],
}

#: What axolotl does with a configuration until it has a trainer, and then the training by transformers' own.
SCRIPT = """
import json, sys
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.config import prepare_plugins, validate_config
from axolotl.utils.dict import DictDefault

import torch, transformers

def train(configuration):
    cfg = DictDefault(configuration)
    prepare_plugins(cfg)
    manager = PluginManager.get_instance()
    [plugin] = manager.plugins.values()
    assert isinstance(plugin, BasePlugin)
    cfg = validate_config(cfg)
    manager.cfg = cfg
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))
    arguments = transformers.TrainingArguments(
        sys.argv[2], max_steps=3, use_cpu=True, report_to="none", save_strategy="no", weight_decay=0.3
    )
    data = [{"input_ids": row, "labels": row} for row in torch.randint(16, (8, 6))]
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    callbacks = manager.add_callbacks_post_trainer(cfg, trainer)
    for callback in callbacks:
        trainer.add_callback(callback)
    manager.post_trainer_create(cfg, trainer)
    trainer.train()
    return [{row.name: row.decay for row in callback.attachment.rows()} for callback in callbacks]

outcomes = []
for configuration in json.loads(sys.argv[1]):
    try:
        outcomes.append(train(configuration))
    except ValueError as error:
        outcomes.append(str(error))
print(json.dumps(outcomes))
"""

GOOD: list[Any] = [
    {"query_key": "LowRank:0.1", "value_output": {"decay": "Frobenius", "strength": 0}, "exclude": ["*.o_proj.*"]},
    "query_key=LowRank:0.1,value_output=Frobenius:0,exclude=*.o_proj.*",
]
BAD: list[tuple[Any, str]] = [
    ({"query_kye": "LowRank:0.1"}, "setting='query_kye' is unknown: did you mean 'query_key'?"),
    ({"query_key": "LowRank:0.1:every=0"}, "every=0 must be a whole number >= 1"),
    (3, "2 validation errors"),
    (None, f"plugins has {PLUGIN}, and the configuration has no section for it: add 'rankdecay: {{query_key"),
]


def test_the_section_is_the_decay_and_errors_are_those_of_the_validation(tmp_path: Path) -> None:
    path = os.pathsep.join([needs.axolotl(), *filter(None, [os.environ.get("PYTHONPATH")])])
    configurations = [CONFIGURATION | {"rankdecay": section} for section in [*GOOD, *(section for section, _ in BAD)]]
    configurations.append({name: value for name, value in CONFIGURATION.items() if name != "plugins"})
    command = [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT, json.dumps(configurations), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=HANG)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    low_rank = "low-rank prox, 0.1, relative"
    for [rows] in outcomes[: len(GOOD)]:
        attention = {name.split(".")[-2]: decay for name, decay in rows.items() if "self_attn" in name}
        assert attention == {"q_proj": low_rank, "k_proj": low_rank, "v_proj": "none", "o_proj": "L2 0.3"}
    for outcome, (section, message) in zip(outcomes[len(GOOD) :], BAD, strict=False):
        assert message in outcome, section
    assert outcomes[-1] == []  # axolotl's manager keeps the plugin for a configuration that does not name it
