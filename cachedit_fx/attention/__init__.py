"""Back ends of attention.

backends.py   the table: what each takes, and where it runs
calls.py      a call of attention in a graph, as back ends judge it
functions.py  what a node calls in place of the model's own attention
sage.py       sageattention as an operator
"""
