"""What users read: `explain`, its text, page and pictures."""
