"""The report of a training run: one page that needs no server."""

from npmoe.reporting.page import html_report, write_report
from npmoe.reporting.series import RunLog, Series, Specialisation, read_run_log

__all__ = [
    "RunLog",
    "Series",
    "Specialisation",
    "html_report",
    "read_run_log",
    "write_report",
]
