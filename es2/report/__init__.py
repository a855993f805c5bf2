"""Words and colours for numbers, figures, and the HTML report. No torch."""
