"""Work on what strangers give, in processes with limits of their own."""
