//! Every state of every configuration. What can't be survived is found.

use model::{CONFIGS, LIMITS, run};

#[test]
fn every_configuration_holds_in_all_its_states() {
    let mut states = 0;
    for config in CONFIGS {
        let outcome = run(config, 2, None);
        println!("{}: {} states, depth {}, {:?}", config.name, outcome.states, outcome.depth, outcome.time);
        if let Some((property, trace)) = outcome.broken.first() {
            panic!("{}: {property}: {:#?}\n{:?}", config.name, trace.actions, trace.last);
        }
        assert!(outcome.unreached.is_empty(), "{} never reaches {:?}", config.name, outcome.unreached);
        assert!(outcome.exhausted);
        states += outcome.states;
    }
    println!("{states} states");
}

#[test]
fn known_limits_are_where_they_are_said_to_be() {
    for config in LIMITS {
        let outcome = run(config, 1, None);
        assert!(!outcome.broken.is_empty(), "{} is survived: {}", config.name, config.about);
    }
}
