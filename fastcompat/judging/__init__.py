"""What an upgrade is judged by: who is relevant to whom, figures, intervals, forecasts."""
