"""Generated charts and documents: drawn pictures with questions and answers, to train, calibrate and judge on."""

from expertflow_quant.samples.item import Item, Question
from expertflow_quant.samples.sheets import Sheet, make_items, make_sheet, split_of

__all__ = ["Item", "Question", "Sheet", "make_items", "make_sheet", "split_of"]
