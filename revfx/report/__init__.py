"""Reports for users: `explain`, its text, page and picture."""
