//! What a Node says: whether the node is to go away, and where it is. Nothing here asks anybody.

use std::collections::BTreeMap;

use serde::Deserialize;

/// Taints by which somebody says that a node is to go away, and who that is.
const TAINTS: [(&str, &str); 11] = [
    ("ToBeDeletedByClusterAutoscaler", "the cluster autoscaler takes it down"),
    ("DeletionCandidateOfClusterAutoscaler", "the cluster autoscaler may take it down"),
    ("karpenter.sh/disrupted", "Karpenter takes it down"),
    ("karpenter.sh/disruption", "Karpenter takes it down"),
    ("cloud.google.com/impending-node-termination", "its cloud takes it down"),
    ("aws-node-termination-handler/spot-itn", "its cloud takes it back"),
    ("aws-node-termination-handler/scheduled-maintenance", "its cloud has maintenance for it"),
    ("aws-node-termination-handler/asg-lifecycle-termination", "its group takes it down"),
    ("aws-node-termination-handler/rebalance-recommendation", "its cloud may take it back"),
    ("node.cloudprovider.kubernetes.io/shutdown", "its cloud has shut it down"),
    ("node.kubernetes.io/out-of-service", "it is out of service"),
];

/// A Node, as far as it matters here.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Node {
    pub(crate) metadata: Metadata,
    #[serde(default)]
    spec: Spec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Metadata {
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    pub(crate) resource_version: String,
    deletion_timestamp: Option<String>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    #[serde(default)]
    unschedulable: bool,
    taints: Option<Vec<Taint>>,
}

#[derive(Clone, Debug, Deserialize)]
struct Taint {
    key: String,
}

impl Node {
    /// Why the node is to go away, in words; `None`: it stays. `more`: taints that say so too.
    pub(crate) fn leaving(&self, more: &[String]) -> Option<String> {
        if self.metadata.deletion_timestamp.is_some() {
            return Some("its Node is being deleted".into());
        }
        let taints = || self.spec.taints.iter().flatten().map(|taint| taint.key.as_str());
        let known = TAINTS.iter().find(|(key, _)| taints().any(|taint| taint == *key));
        if let Some((key, who)) = known {
            return Some(format!("{who} (taint {key})"));
        }
        if let Some(key) = taints().find(|taint| more.iter().any(|key| key == taint)) {
            return Some(format!("it has the taint {key}"));
        }
        self.spec.unschedulable.then(|| "it is cordoned".into())
    }

    /// Whether it has that annotation.
    pub(crate) fn has_annotation(&self, key: &str) -> bool {
        self.metadata.annotations.contains_key(key)
    }

    /// Where it is, by `names`: our name of a level, the Node's label. A label that it lacks is left out.
    pub(crate) fn places(&self, names: &BTreeMap<String, String>) -> BTreeMap<String, String> {
        let labels = &self.metadata.labels;
        let place = |(level, label): (&String, &String)| {
            Some((level.clone(), labels.get(label).filter(|value| !value.is_empty())?.clone()))
        };
        names.iter().filter_map(place).collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(spec: serde_json::Value) -> Node {
        let metadata = json!({
            "name": "gpu-1",
            "resourceVersion": "17",
            "labels": {"topology.kubernetes.io/zone": "a", "example.com/rack": ""},
        });
        serde_json::from_value(json!({"metadata": metadata, "spec": spec})).unwrap()
    }

    #[test]
    fn a_node_that_is_to_go_away_says_so() {
        let taint = |key: &str| json!({"taints": [{"key": key, "effect": "NoSchedule"}]});
        for spec in [
            json!({}),
            json!({"taints": null, "unschedulable": false}),
            taint("nvidia.com/gpu"),
            // Every spot node has these from its first moment on.
            taint("kubernetes.azure.com/scalesetpriority"),
            taint("cloud.google.com/gke-spot"),
            taint("node.kubernetes.io/not-ready"),
        ] {
            assert_eq!(node(spec.clone()).leaving(&[]), None, "{spec}");
        }
        let said = |spec| node(spec).leaving(&["example.com/retire".into()]).unwrap();
        assert_eq!(said(json!({"unschedulable": true})), "it is cordoned");
        assert!(said(taint("karpenter.sh/disrupted")).starts_with("Karpenter takes it down"));
        assert!(
            said(taint("ToBeDeletedByClusterAutoscaler")).starts_with("the cluster autoscaler")
        );
        assert!(said(taint("aws-node-termination-handler/spot-itn")).contains("takes it back"));
        assert_eq!(said(taint("example.com/retire")), "it has the taint example.com/retire");
        let mut deleted = node(json!({}));
        deleted.metadata.deletion_timestamp = Some("2026-01-01T00:00:00Z".into());
        assert_eq!(deleted.leaving(&[]).unwrap(), "its Node is being deleted");
    }

    #[test]
    fn it_is_where_its_labels_say() {
        let pairs = [
            ("zone", "topology.kubernetes.io/zone"),
            ("rack", "example.com/rack"),
            ("host", "example.com/host"),
        ];
        let names = pairs.map(|(level, label)| (level.to_owned(), label.to_owned())).into();
        let places = node(json!({})).places(&names);
        assert_eq!(
            places,
            [("zone".to_owned(), "a".to_owned())].into(),
            "and not in an empty rack"
        );
    }
}
