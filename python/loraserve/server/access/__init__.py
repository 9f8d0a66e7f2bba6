"""Who calls, what they may use and see, and how much they may ask for."""
