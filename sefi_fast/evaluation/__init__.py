"""Pictures to look at: contact sheets and training curves."""

from sefi_fast.evaluation.sheets import Panel, contact_sheet, training_curves

__all__ = ["Panel", "contact_sheet", "training_curves"]
