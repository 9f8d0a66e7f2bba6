"""What client and server say to each other over gRPC: messages and errors."""
