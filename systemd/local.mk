# Units and what they need.
