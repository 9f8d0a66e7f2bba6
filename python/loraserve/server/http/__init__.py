"""The HTTP front end over one engine: OpenAI's and TGI's routes, administration, metrics, the dashboard."""
