"""`deco plan`: would a run fit on hardware that is not here, and how fast could it be?"""
