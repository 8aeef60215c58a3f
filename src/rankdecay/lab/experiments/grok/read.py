"""Names that experiments not yet ported import from here."""

from rankdecay.lab.report.words import is_number

__all__ = ["is_number"]
