"""How good a retrieval system is, and what an upgrade of it wins and loses."""
