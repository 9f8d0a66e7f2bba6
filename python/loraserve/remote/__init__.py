"""Files of object stores and web servers: where they lie, brought here whole, kept on disk."""
