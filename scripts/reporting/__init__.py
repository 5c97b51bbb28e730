"""Parts of the report page; `scripts.report` writes it."""
