"""Commands on rivals of nPMI."""
