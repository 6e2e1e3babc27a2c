"""HTML pages: the style that all share, and the page of a run."""
