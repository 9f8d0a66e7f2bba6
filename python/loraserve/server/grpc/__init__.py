"""The gRPC front end: the LoraServe service."""
