"""Results as a page: tables and charts of sweeps, models and trainings, as one HTML file and as Markdown."""
