"""Pictures to look at: contact sheets, training curves, keys and values swapped."""

from sefi_fast.evaluation.sheets import Panel, contact_sheet, training_curves
from sefi_fast.evaluation.swapping import swap_sheet

__all__ = ["Panel", "contact_sheet", "swap_sheet", "training_curves"]
