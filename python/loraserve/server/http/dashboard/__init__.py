"""The dashboard: one page of static files that asks the server's own HTTP routes for all it shows."""
