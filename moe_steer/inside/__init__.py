"""What lies inside a decoder layer, and modules whose forward is another for a while."""
