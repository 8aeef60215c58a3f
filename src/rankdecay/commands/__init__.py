"""Commands of the library: ``inspect`` and ``compress``; those of the lab are in :mod:`rankdecay.lab.cli`."""
