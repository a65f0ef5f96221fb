"""What users read: `explain`, its text, page and pictures, and how far regeneration drifts."""
