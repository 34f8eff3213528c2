"""What thoughts state: attempts, over- and underthinking, by arm."""
