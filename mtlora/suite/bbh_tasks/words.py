"""Words of BIG-Bench Hard's inputs (MIT licence), for the generators."""

# People of web_of_lies.
LIARS = (
    "Alejandro", "Alexis", "Amberly", "Andree", "Antwan", "Audrie", "Bernita", "Christie", "Conception", "Crista",
    "Dallas", "Delbert", "Delfina", "Elanor", "Fidel", "Fletcher", "Gwenn", "Helene", "Inga", "Jamey", "Jaymie",
    "Jerry", "Jim", "Ka", "Kandi", "Kristian", "Leda", "Lorine", "Maybelle", "Michael", "Michaela", "Millicent",
    "Millie", "Osvaldo", "Phoebe", "Rashida", "Raymond", "Ryan", "Sal", "Shalonda", "Shaunda", "Shenna",
    "Sherrie", "Sima", "Tamika", "Teressa", "Vernell", "Vina", "Willian", "Yoland",
)  # fmt: skip

# What object_counting counts: singular and plural, by kind.
THINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "objects": (
        ("bed", "beds"), ("car", "cars"), ("chair", "chairs"), ("couch", "couches"), ("fridge", "fridges"),
        ("lamp", "lamps"), ("microwave", "microwaves"), ("oven", "ovens"), ("stove", "stoves"),
        ("table", "tables"), ("toaster", "toasters"),
    ),
    "vegetables": (
        ("cabbage", "cabbages"), ("carrot", "carrots"), ("cauliflower", "cauliflowers"), ("garlic", "garlics"),
        ("head of broccoli", "heads of broccoli"), ("lettuce head", "lettuce heads"), ("onion", "onions"),
        ("potato", "potatoes"), ("stalk of celery", "stalks of celery"), ("yam", "yams"),
    ),
    "animals": (
        ("bear", "bears"), ("cat", "cats"), ("chicken", "chickens"), ("cow", "cows"), ("dog", "dogs"),
        ("donkey", "donkeys"), ("duck", "ducks"), ("fish", "fish"), ("frog", "frogs"), ("goat", "goats"),
        ("mouse", "mice"), ("pig", "pigs"), ("rabbit", "rabbits"), ("snail", "snails"), ("snake", "snakes"),
    ),
    "musical instruments": (
        ("accordion", "accordions"), ("clarinet", "clarinets"), ("drum", "drums"), ("flute", "flutes"),
        ("piano", "pianos"), ("trombone", "trombones"), ("trumpet", "trumpets"), ("violin", "violins"),
    ),
    "fruits": (
        ("apple", "apples"), ("banana", "bananas"), ("blackberry", "blackberries"), ("grape", "grapes"),
        ("nectarine", "nectarines"), ("orange", "oranges"), ("peach", "peaches"), ("plum", "plums"),
        ("raspberry", "raspberries"), ("strawberry", "strawberries"),
    ),
}  # fmt: skip

# Adjectives of hyperbaton by class, in the order that it takes for correct: opinion, size, age, shape, colour, origin,
# material, purpose.
ADJECTIVES: tuple[tuple[str, ...], ...] = (
    ("awful", "good", "lovely", "mysterious", "nice", "obnoxious", "repulsive", "ridiculous", "silly", "terrible",
     "wonderful"),
    ("big", "enormous", "huge", "large", "little", "massive", "medium-size", "midsize", "normal-size", "small",
     "tiny"),
    ("ancient", "archaic", "brand-new", "new", "old", "old-fashioned"),
    ("circular", "prismlike", "pyramidal", "rectangular", "spherical", "square", "triangular"),
    ("aqua", "black", "blue", "brown", "crimson", "gray", "green", "grey", "indigo", "ivory", "maroon", "orange",
     "pink", "purple", "red", "tan", "teal", "violet", "white", "yellow"),
    ("American", "Bangladeshi", "Brazilian", "Chinese", "Congolese", "Egyptian", "Ethiopian", "Filipino",
     "German", "Indian", "Indonesian", "Iranian", "Japanese", "Mexican", "Nigerian", "Pakistani", "Russian",
     "Thai", "Turkish", "Vietnamese"),
    ("cardboard", "cloth", "fiberglass", "glass", "gold", "iron", "lead", "leather", "paper", "plastic", "rubber",
     "silver", "steel", "wood", "wool"),
    ("drinking", "driving", "eating", "exercise", "hiking", "smoking", "snorkeling", "typing", "walking",
     "whittling"),
)  # fmt: skip
HYPERBATON_NOUNS = (
    "baby", "car", "cat", "chair", "computer", "dog", "knife", "match", "monkey", "motorcycle", "ship", "shoe",
    "sock", "surfboard", "sweater",
)  # fmt: skip

# Things of reasoning_about_colored_objects, singular and plural, and the colours in the order of its options.
COLORED = (
    ("booklet", "booklets"), ("bracelet", "bracelets"), ("cat toy", "cat toys"), ("crayon", "crayons"),
    ("cup", "cups"), ("dog leash", "dog leashes"), ("envelope", "envelopes"),
    ("fidget spinner", "fidget spinners"), ("jug", "jugs"), ("keychain", "keychains"), ("mug", "mugs"),
    ("necklace", "necklaces"), ("notebook", "notebooks"), ("pair of sunglasses", "pairs of sunglasses"),
    ("paperclip", "paperclips"), ("pen", "pens"), ("pencil", "pencils"), ("plate", "plates"),
    ("puzzle", "puzzles"), ("scrunchiephone charger", "scrunchiephone chargers"),
    ("sheet of paper", "sheets of paper"), ("stress ball", "stress balls"), ("teddy bear", "teddy bears"),
    ("textbook", "textbooks"),
)  # fmt: skip
COLORS = (
    "red", "orange", "yellow", "green", "blue", "brown", "magenta", "fuchsia", "mauve", "teal", "turquoise",
    "burgundy", "silver", "gold", "black", "grey", "purple", "pink",
)  # fmt: skip

# People, places and doings of temporal_sequences.
WITNESSES = (
    "Andrew", "Anthony", "Ashley", "Betty", "David", "Elizabeth", "Emily", "Hannah", "James", "Jason", "Jennifer",
    "Jessica", "John", "Kimberly", "Leslie", "Linda", "Lisa", "Mark", "Mary", "Michael", "Nancy", "Richard",
    "Samantha", "Sarah", "Sean", "Steven", "Susan", "Thomas", "Tiffany", "William",
)  # fmt: skip
DESTINATIONS = (
    "amusement park", "art show", "art studio", "bakery", "basketball court", "beach", "bookstore",
    "clothing store", "coffee shop", "construction site", "dance studio", "football field", "gas station",
    "library", "market", "movies", "museum", "orchestra hall", "park", "physics classroom", "restaurant",
    "soccer field", "swimming pool",
)  # fmt: skip
DOINGS = (
    "attending class at the school", "buying a bike at the bike shop", "buying a phone at the electronics store",
    "buying clothes at the mall", "buying cookies at a bakery", "buying lunch at the deli",
    "driving to the water park", "fixing their computer at the electronic store", "getting a coffee at the cafe",
    "playing tennis at the tennis court", "reading at the library", "sitting on a rooftop",
    "stretching at a yoga studio", "taking photos near the Eiffel Tower",
    "taking photos near the Leaning Tower of Pisa", "waiting at the airport", "waiting at the train station",
    "walking in the garden", "walking towards the Statue of Liberty", "watching a movie at the theater",
    "working at the office", "working out at the gym",
)  # fmt: skip

# Words of word_sorting.
SORTED_WORDS = tuple(
    """
    abbas abbe abc abdominal aberdeen abramson abuilding academia accelerate accept accessory acclaim accomplice
    accrue acidify acquisitive acuity ada address adipic admiration adonis adposition adsorption advent aerospace
    afternoon aggression agile airlift aitken alcohol aldebaran algonquin align alkali alleviate allis allocable
    allot allure allusion alpenstock alphabet altercate alveolar amerada amethyst amicable amos analogue anastasia
    anastomosis anastomotic anger angus anharmonic animism announce annuity antaeus antagonism anthology
    anticonvulsant antique antler apache aperture appliance apprehension aqueous arabesque arachne archery
    archipelago arkansan arlen army aroma arragon artistry asplenium asset assimilable asteria astigmat astronomic
    athlete atmospheric atonic austere authenticate autocracy avalanche average award awash az backslide backyard
    bandgap bangui barbudo baronial barycentric batavia bate bathos bauer beachhead beau beauteous beautiful bedroom
    bedtime behind behold bend benelux bengal berg berry bertram besetting bessie bighorn bijective bilinear biplane
    birdseed birmingham bivalve bivariate blackguard blackstone blend blest block bloodstain bluish blythe bobbin
    bodyguard bologna bombproof bona bone bonito booby boon bootlegging bottle bought bounty boutique boxwood boyd
    boyish bradshaw brake brassiere breach breezy brenda bride bridesmaid brindle briton browne bruckner bruno
    buckle budd built bunny buoyant burgher burrow butadiene butch butt butterscotch buxton bystander cabbage
    cabdriver cacao calligraph callous callus calumny calvert calypso cameron cameroon campfire can't canaan canada
    canal cankerworm cantonese carbonic carcinogen carlisle carp carport carrageen cascade cashew cast castigate
    catch catsup cavalier caw celebrity champ champlain chapati chaplin charm chauncey checksum chess chevalier
    chigger chivalry choose choral choreograph christen christiana chromium chrysalis cicero circuitous circumcircle
    circumstance cite citizen clapeyron clatter clayton clearheaded clergymen clifford climb clonic clothbound co
    coachman coachmen coastal cocksure coddington coddle code cognoscenti coherent coleus comet commando commensal
    comment commodity common companion complementary compton concision conclusion concord condiment cone confess
    confident confidential confrontation consignee conspiracy consternate constructor contaminant contaminate
    contextual contrast contribute convair convergent convey convoy coo coquette coriolanus cornerstone corpulent
    cortex cortez corvallis cottrell cotyledon countersink counterweight county courtroom coypu crackle craftsmen
    cram creak cream credit crepe croupier crowfoot crude cruise crunchy cubby cunard cure curvilinear custodian
    custody cutlet cytolysis daddy daffy damn damon danbury danubian dare dartmouth dateline daughter deadwood dean
    deciduous decimate decoy deerstalker definite deform delirious deliver delmarva demystify denmark deregulate
    derivate designate despond detergent deterrent detest devonshire dew diagnosable diagnose diatom dilate dim din
    discovery disseminate dissipate dive dixie dnieper dobbin dockyard doff doge dogfish dogging dogwood doleful
    dormouse doubtful downey drafty dreamboat dredge driveway drone drool duopoly dusenberg dusky dustbin duty
    dyestuff earthy easel easternmost eaten eclipse educate effusive eigenspace elizabethan emacs emancipate embark
    embolden emission emittance emplace encapsulate encumber endothelial ensemble entourage entrepreneurial entropy
    enviable envious eosine epaulet equestrian erg ernie escutcheon eulogy europa europium exclusive execrable
    exempt exonerate exorcism exotica experiment exploitation extensible extensive extoller extreme extricable
    facetious facto faery fairfax falcon falsetto falter farrell fashion fateful fatten feed felice felicia ferocity
    fettle fiberboard fiction fiducial figural filly firewood flagellate flair flamboyant florist floruit flotation
    fluke fluorine foliate fomalhaut fond foraminifera ford form format formula forth fortieth fortran fossiliferous
    foundling foxtail fracture frighten frill fritter frolic fructose fumarole functor fungi fungus gabriel gadwall
    gag gaillardia gala gambit game gamut garrison gastronomic gaucherie gaussian gavin gazpacho gentlemen
    geophysical geopolitic germinal giantess gibson giveth glamour glance gland gloat gloria glycogen gneiss goat
    gob godson golf good gossamer grammarian granular greasy grecian griffith grocer groove guaranty guidebook gunk
    hackberry haggard hamburger handlebar hangout hanoverian hanukkah hardbound hasty haughty have hayes heaven
    hecatomb heck helical hello helvetica henchman hendrickson heron hesitate hessian heterozygous heusen hew
    hexadecimal hi hide hideaway highlight highwaymen hindustan hirsute histology hobble holeable hollister holocene
    homeobox homeowner honeybee hood horehound hornpipe horsepower hostelry hotbox household huckster hun hunt
    hurricane hydrate hydrology hyperboloid hypothalamus hypothesis ia immaculate impede implementor improbable
    inability inanimate incantation incautious incense incident income inconvertible incurring indicate indifferent
    indiscoverable indoeuropean indomitable inebriate inequity ineradicable infantrymen inflammation info
    inhabitation inhibit iniquity injun inkling inmate inroad insane inscribe insist insubstantial intangible
    integral intercept introvert inverness invigorate invincible invocable involve ipsilateral irreducible
    irrevocable islamabad jackboot jacket jackson jacobi janice jest jibe jigsaw jill jive jocund jordan jot judaica
    judaism jutish kajar kamikaze kangaroo kennan kenney kill kind klaxon knob knutson kochab kruger kudo labile
    labour lacunae lakeside landau landlady langmuir lapidary laramie laudatory lauderdale laughlin lazy leasehold
    leather leatherback lengthy libya lift liggett lightface lightfooted lineage liquidate lise litigant loam
    lobster loch loci lockwood lodge logarithm loire lola loosestrife lorry lost lozenge lucrative ludlow lumber
    lunge lysergic macedon macedonia magistrate magnesium magnificent maharaja maidenhair mainstream maladapt
    maladjust malformed malleable mallow mandate manley mantic manumitted mare marimba marionette mark markov
    marlborough marmot marque marshall marshmallow mast mater mathieu matte mattress maybe mcconnell mcgee mcintosh
    mcleod meager mechanic mechanism medea medlar megohm membrane memorandum mendelevium menlo mental merry metal
    methanol metzler miaow micron middle midwinter miff militant militia mimosa minstrelsy mirth misogyny mollie
    molybdate monochromator monomer monotonous moran more mortify motif muddy mulligatawny multifarious multiplet
    multiplexor muriel murk muscular musky muslim nagasaki nail nanosecond nascent nat nate nebuchadnezzar necessity
    neff neoclassic nepotism neuroanatomic neutrino newman newsboy newsmen nick nicodemus nigeria niggle nikko
    nimble nimbus nine ninebark nitric nobody nod nominee nose novel nucleus nudge nutrient nv o'connell oakland
    obfuscatory obstinacy obtuse ocean octennial odysseus officious often okinawa olefin olivia olympic omnipotent
    onerous optimal orchestra orphanage overture ovipositor oxalic pacifism paginate palazzi pam parameter parentage
    parmesan parochial pasty pathetic patrolman paula paunchy pay pease peccary peculate peloponnese pelvis pendulum
    penny pepperoni perceptive permafrost persona peruse pestle petition pewee phenol phenotype philology phloem
    phonetic phony picnicking pierson piggish pillage pincer pinkish pintail pipeline pipette pique pivot pizzicato
    planeload planetaria plat platelet plentiful pleura plume poland polkadot polyhedra polytypy pomade pooh poole
    pore porridge portfolio possible posterior postpone postprocess postprocessor potpourri pow prank pray precise
    predatory prig pristine prize pro procedural procrustean profuse projectile promulgate proofread proscenium
    proserpine protector proton provocation proximity puerto pulitzer pulsate purgatory purport purpose purposive
    putnam putt putty pvc pyridine pyrotechnic quad quail quantify quantitative quench quizzes r&d racy radix rae
    raft railway raincoat raisin rajah rally ranch rastus reconnaissance referring refractory region registrar
    regret relinquish residuary resignation resistive responsible rest retardant retrofit reverie reversible
    rheumatic rica ride right robertson rockaway ron roughshod roundabout rowley ruanda rubaiyat sacramento sal
    sammy sandia sandy sanford sanhedrin sans saprophytic sarcastic satisfy saute sawbelly sawfly sawtimber scald
    scalp scavenge scherzo schroedinger scorn scotia scratchy screechy scribe scrub scrubby scrupulous scurrilous
    seaborg seashell seashore seaworthy sediment seepage sensory separate septuagenarian serenade shakespearian
    shanghai shape sharon sheaf sheep shelf shelter shiva shivery shortcoming shreveport shuffleboard shutout sibyl
    sideboard siemens sierra sigh sigmund silage silver silvery sin singlet sinkhole sinter siren siskin sisyphus
    skimpy skinny slaughterhouse sleuth slick smooth snipe snippet snowball snuff sociolinguistic sojourn solicit
    solvate somatic song sonority soothe sophocles sortie sound southeast southeastern souvenir sovereignty sow
    spavin spearmint spec specify spermatozoa spitz spokesperson spongy spontaneity spotlight sprightly spruce
    spumoni squabble staircase stanhope stapleton starlight statuette statutory staunch stearic steel steelmake
    sterno sticktight stiffen stigmata stipulate stirrup stitch stonewort stormy stowaway strip studious stupor
    subliminal sudan summand summate superior supposable suppose sushi swab swabby swart swathe swaziland sweatshirt
    sweepstake swingable swipe syllabus symmetry synaptic synchronous syndicate tabletop tale talon tamp tariff
    tattoo tea technion ted teem teen tel termcap terminal testate testy them therewith they've thigh thimble
    thirteenth threadbare threefold threshold thunderclap thymine tinfoil tipoff tiresome toggle tomography too
    toothpaste tornado toroidal towel townsmen tragedian trainman trammel trample tramway transitive translate
    trapezoidal treadle trench trident trillion triode triploidy trumpery trundle tty tularemia tunnel turvy
    tuscarora twelvefold tyke typescript uganda umber umbilical uncle undulate unesco unitary upon upraise uptake
    ursa usable ussr vague vale variety varsity vassar venezuela venice ventricle verify vesper veterinarian viaduct
    vice victoria vinegar vision vociferous volcanism voltaire vs wagging wagoneer waite walkie wallaby wallboard
    walt washy watchworks watson wellwisher wetland wheelbase whelan whereabout whim whimper whiteface whitetail
    whodunit wier wigging wigwam wilcox wildcat wildflower wiley willard wink wiseacre wishful woebegone woodcarver
    woodcut worcestershire wrapup wring wrongdoer xerxes xylem yang yaounde yap yates yeager yeats yen yoghurt you'd
    you've ytterbium yves z's zig zinc zip zorn zoroaster
    """.split()  # noqa: SIM905
)
