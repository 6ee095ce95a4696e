"""Pictures on request: what may be asked, who makes it, what a picture tells of itself, and how they are shown."""
