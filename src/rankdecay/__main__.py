"""`python -m rankdecay`, for an interpreter whose scripts are not on the path, and for `torchrun -m`."""

from rankdecay.cli import console

if __name__ == "__main__":
    console()
