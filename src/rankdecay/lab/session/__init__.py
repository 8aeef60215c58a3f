"""One large model trained as a user of the library would, alone or under torchrun."""
