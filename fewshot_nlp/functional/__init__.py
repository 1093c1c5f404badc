"""Pure functions over tensors: attention, update rules, inner loops. Only torch is known here."""
