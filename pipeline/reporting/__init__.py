"""One run or several as a page: HTML, Markdown, JSON."""
