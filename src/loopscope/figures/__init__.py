"""Plain data as tables of HTML and as plotly figures: how records show themselves."""
