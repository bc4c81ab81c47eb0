"""What is held out of training, chosen once by hash: things, among the last words of the stamps' and the emoji's
captions (of those that at most twelve captions are of and at most two others name), and words spoken in prompts (of
those that at most six prompts hold)."""

TEST = frozenset(
    """
    abacus accept adenium airplane amulet anchor ant art artist australia bear bee beginner binocular bomb bouquet
    cabinet cake camel cello chick child chime chipmunk church city coco coconut coffee comet cone cottage cracker
    cross crossbone crossing crow cuckoo cucumber curl cymbal dancer dharma die disk drake drone duck echidna
    elevator emblem equal falafel farm ferry fireman flamingo food fork frame frog gazania gear gift girl goblin
    gorilla gravestone groper hair haircut hamsa handball hanger helicopter hoop hotel hourglass hunter igloo
    kaaba kettle kite knife label lark leg levitating libra luggage magnet mango mask massage memo merperson
    microbe monastery monkey monocle moose motorcycle multiplication myanmar newspaper ninja nothing nutcracker
    octopus oden olive orca owl oyster park pawn peach pecan pelican phone pie pilot pisce plant pod popper pouch
    present puck pump racing rail rat receipt rest rice rocket room root rowboat ruler sailboat sandal saw scale
    score screwdriver seat secret shamrock shark shirt shrimp shrine skier slide snowboarder spoon squash stone
    strawberry student sunflower supervillain surfing swimming swimsuit sword tail tangerine taurus tent thaadi
    thirty time toilet tooth toothbrush tornado trap triangle trolley trolleybus turkey turtle uniform vertically
    waffle walnut wand way windmill worker
    """.split()  # noqa: SIM905
)
VALIDATION = frozenset(
    """
    africa ahead alembic antenna bar bike bison bubble buoy bus closet clover design dragonfly drum fist folder
    guitar hamburger hen inn joker key lamp lightbulb livestock marigold medal nest pant petunia pitcher pizza
    plier plug projector rabbit radioactive ray receiver reindeer rose sand sari skateboard smile sponge swan tape
    telescope university vest web wireless worm yam
    """.split()  # noqa: SIM905
)
SPOKEN = frozenset(
    """
    access administrators answer assisting attempt colon connect correct delete friday future glorious
    indentified introduction july know later limit line make management meet minimum mobile moment most nineteen
    parking personal place placed prepending right seven seventeen sixteenth some standard third thursday tick
    today transfer truncate twenty unmuted user witheld yesterday
    """.split()  # noqa: SIM905
)
