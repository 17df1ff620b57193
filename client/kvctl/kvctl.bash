# Completion of kvctl for bash. The program itself knows its commands and options.
_kvctl()
{
    local word command i

    COMPREPLY=()
    word=${COMP_WORDS[COMP_CWORD]}
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
        -s | --socket) ((i++)) ;;
        -* | =) ;;
        *)
            command=${COMP_WORDS[i]}
            break
            ;;
        esac
    done
    case $word in
    -*)
        mapfile -t COMPREPLY < <(compgen -W "$(kvctl __complete "${command:-none}" 2>/dev/null)" -- "$word")
        [[ ${COMPREPLY[0]-} == *= ]] && compopt -o nospace
        return
        ;;
    esac
    case $command in
    '') mapfile -t COMPREPLY < <(compgen -W "$(kvctl __complete 2>/dev/null)" -- "$word") ;;
    ls) mapfile -t COMPREPLY < <(compgen -W "blocks spaces workers tenants" -- "$word") ;;
    codec)
        if [[ ${COMP_WORDS[COMP_CWORD - 1]} == codec ]]; then
            mapfile -t COMPREPLY < <(compgen -W "list encode decode error" -- "$word")
        else
            mapfile -t COMPREPLY < <(compgen -f -- "$word")
        fi
        ;;
    config)
        mapfile -t COMPREPLY < <(compgen -W "$(kvctl config 2>/dev/null | cut -d' ' -f1)" -S = -- "$word")
        compopt -o nospace
        ;;
    show | pin | unpin)
        [[ $word ]] && mapfile -t COMPREPLY < <(compgen -W "$(kvctl ls --long --key="${word:0:$((${#word} / 2 * 2))}" --limit=20 2>/dev/null | tail -n +2 | cut -d' ' -f1)" -- "$word")
        ;;
    esac
}
complete -F _kvctl kvctl
