//! What comes as text or as messages of others: configuration strings, the configuration file, netlink events.

use cfgstring::Config;
use img_tcmu::daemon::check;
use img_tcmu::tcmu::netlink;

/// A string that parses is printed such that it parses to the same, and such that nobody on its way cuts it.
pub fn cfgstring(data: &[u8]) {
    let Some((kind, text)) = data.split_first() else { return };
    let config = match kind % 3 {
        0 => Config::parse(text),
        1 => {
            let _ = check::dev_config_syntax(text);
            Config::parse_dev_config(text)
        }
        _ => {
            let _ = std::str::from_utf8(text).map(img_tcmu::config::Configuration::parse);
            return;
        }
    };
    let config = match config {
        Ok(config) => config,
        Err(error) => {
            assert!(error.column() >= 1 && error.column() <= text.len() + 2, "column {} of {}", error.column(), text.len());
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    let printed = config.to_string();
    if printed.len() + cfgstring::SUBTYPE.len() + 1 > cfgstring::MAX_LEN {
        return;
    }
    match Config::parse(printed.as_bytes()) {
        Ok(again) => assert_eq!(again, config, "{printed:?} is something else"),
        Err(error) => panic!("{printed:?} does not parse: {error}"),
    }
    cfgstring::check_targetcli(printed.as_bytes()).unwrap_or_else(|error| panic!("{printed:?}: {error}"));
    assert_eq!(Config::parse_dev_config(format!("img/{printed}\n").as_bytes()).as_ref(), Ok(&config));
}

/// Datagrams of the kernel's family.
pub fn netlink(data: &[u8]) {
    for event in netlink::events_in(data, 30, "img") {
        assert_eq!(event.name.subtype, "img");
        let _ = netlink::answer_to(&event, 30, i32::from(data.len() as u8), 1);
    }
    let _ = netlink::family_in(data, "config");
}
