"""What commands print: one file for each, with ``show(summary, config)`` over the summary that ``--json`` prints."""
