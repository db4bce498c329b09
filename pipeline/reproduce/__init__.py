"""The evidence: independent runs that a cluster can share out, and the tables made of them."""
