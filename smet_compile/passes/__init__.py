"""How the graph changes: the compiler passes over the joint forward and backward graph."""
