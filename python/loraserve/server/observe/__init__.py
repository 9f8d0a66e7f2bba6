"""What is measured, traced and logged of requests, for HTTP and gRPC alike."""
