"""Maps checkpoint tensors to parameters: rule table, name matching, assignment, and transforms between the two."""
