"""What a sweep found, to be read: a page, a table in a terminal, a fragment for a notebook.

from torchrecycle.report import write_page

write_page([result], Path("report"), title="Cars by model")  # report/index.html and report/plots/
"""

from torchrecycle.report.notebook import html_of
from torchrecycle.report.page import write_page
from torchrecycle.report.plots import ReportError
from torchrecycle.report.terminal import notes, print_table, tables

__all__ = ["ReportError", "html_of", "notes", "print_table", "tables", "write_page"]
