"""One figure for each analysis: matplotlib for the paper, plotly for the page."""
