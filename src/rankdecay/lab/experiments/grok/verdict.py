"""Names that experiments not yet ported import from here."""

from rankdecay.lab.report.page import Verdict
from rankdecay.lab.report.words import listed, wilson_interval

__all__ = ["Verdict", "listed", "wilson_interval"]
