"""What a torch layer is: its kind, its weight, which layers a config chooses."""
