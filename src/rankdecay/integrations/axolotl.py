"""Plugin of axolotl: decays by role from its YAML file.

.. code-block:: yaml

    plugins:
      - rankdecay.integrations.axolotl.RankDecayPlugin
    rankdecay:
      query_key: LowRank:0.1
      value_output: {decay: Frobenius, strength: 0.0}
      exclude: [lm_head]

The section is what :func:`rankdecay.decays` reads, a dictionary or one line of text. axolotl makes the optimizer.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]
from pydantic import BaseModel, field_validator

from rankdecay.decay.settings import decays
from rankdecay.integrations.transformers import RankDecay

_NAME = f"{__name__}.RankDecayPlugin"


class RankDecayArgs(BaseModel):
    """The plugin's part of axolotl's configuration.

    Attributes:
        rankdecay: settings, as for :func:`rankdecay.decays`.
    """

    rankdecay: dict[str, Any] | str | None = None

    @field_validator("rankdecay")
    @classmethod
    def _check(cls, settings: dict[str, Any] | str | None) -> dict[str, Any] | str | None:
        """Read the settings, so that an error is axolotl's own error of validation."""
        if settings is not None:
            decays(settings)
        return settings


class RankDecayPlugin(BasePlugin):
    """Gives axolotl's trainer a :class:`rankdecay.integrations.transformers.RankDecay`."""

    def register(self, cfg: Any) -> None:
        """Check that the configuration has settings.

        Raises:
            ValueError: If it names the plugin alone.
        """
        if _NAME in (cfg.get("plugins") or []) and not cfg.get("rankdecay"):
            raise ValueError(
                f"plugins has {_NAME}, and the configuration has no section for it: add "
                "'rankdecay: {query_key: LowRank:0.1}'."
            )

    def get_input_args(self) -> str:
        """Return the name of the class of arguments."""
        return f"{__name__}.RankDecayArgs"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[RankDecay]:
        """Return the callback, where this configuration has settings: axolotl keeps plugins of earlier ones."""
        return [RankDecay(cfg.rankdecay)] if cfg.rankdecay else []
