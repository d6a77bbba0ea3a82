#!/usr/bin/env bash
# Release what is committed: the version, the changelog and the archive of the collection, as one tagged commit.
set -euo pipefail
cd "$(dirname "$0")/.."
version=$1

refuse() {
  echo "There is no release ${version:-without a version}: $*" >&2
  exit 2
}

releases=$(git tag --list '[0-9]*' --sort=version:refname)
[[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]] ||
  refuse 'the version has to be three numbers. Give it: make release VERSION=1.2.3'
sort --version-sort --unique --check=silent <<< "${releases:+$releases$'\n'}$version" ||
  refuse "it has to be greater than ${releases##*$'\n'}, the last one. Give a greater one: make release VERSION=…"
[[ -z $(git status --porcelain) ]] ||
  refuse 'these files are not committed. Commit them or remove them:' "$(git status --short)"
compgen -G 'changelogs/fragments/*.yml' > /dev/null ||
  refuse 'changelogs/fragments is empty. Write there what users will notice'

# Whatever fails here leaves no tag, and git restore . undoes it.
sed --in-place "s/^version: .*/version: $version/" galaxy.yml
antsibull-changelog release
ansible-galaxy collection build --force
git commit --quiet --all --message "Release $version"
git tag --annotate --message "Release $version" "$version"
echo "Released $version. Publish it: git push --follow-tags"
