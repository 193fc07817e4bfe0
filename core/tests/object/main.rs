//! The object tier against real servers, and against a proxy between it and them.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout)] // Tests.

#[path = "../common/mod.rs"]
mod common;
mod cascade;
mod conditional;
mod credentials;
mod faults;
mod lagging;
mod proxy;
mod runs;
mod servers;
mod uploads;

use servers::Place;
use tierkeep::{
    testing::contract::{self, Lack},
    tier::{
        Tier,
        object::{ObjectTier, address::Options},
    },
};

fn open(place: &Place) -> ObjectTier {
    ObjectTier::open(&place.url.parse().expect("address"), &place.options).expect("open")
}

#[test]
fn a_bucket_that_speaks_s3_keeps_the_contract() {
    let place = servers::s3();
    open(&place).check().expect("the bucket is there");
    contract::holds(&|| Box::new(open(&place)) as Box<dyn Tier>);
}

#[test]
fn a_directory_by_its_url_keeps_the_contract() {
    let dir = tempfile::tempdir().expect("tempdir");
    let url = format!("file://{}/root/run", dir.path().display());
    let open = || tierkeep::tier::object::open(&url, &Options::new()).expect("open");
    contract::holds(&|| Box::new(open()) as Box<dyn Tier>);
    let option = Options::from([("aws_region".into(), "x".into())]);
    let e = tierkeep::tier::object::open(&url, &option).map(drop).expect_err("no options");
    assert!(e.chain().contains("aws_region"), "{}", e.chain());
    assert!(tierkeep::tier::object::open("file://relative", &Options::new()).is_err());
}

#[test]
fn a_bucket_that_speaks_googles_protocol_keeps_the_contract() {
    let place = servers::gcs();
    open(&place).check().expect("the bucket is there");
    assert!(!open(&place).decides_who_was_first().expect("an answer"), "this server can do it");
    // fake-gcs-server knows no uploads in parts in the protocol that `object_store` speaks.
    let lacks = [Lack::Parts];
    contract::holds_but(&|| Box::new(open(&place)) as Box<dyn Tier>, &lacks);
}

#[test]
fn a_container_that_speaks_azures_protocol_keeps_the_contract() {
    let place = servers::azure();
    open(&place).check().expect("the container is there");
    contract::holds(&|| Box::new(open(&place)) as Box<dyn Tier>);
}
