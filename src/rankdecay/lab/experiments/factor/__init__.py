"""Matrix experiment: is L2 on two factors the nuclear norm of their product?"""
